"""Studies: tables and figures over several trainings and seeds, each by one command (python -m bvae.study)."""
