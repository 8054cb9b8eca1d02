"""The families of models that stage 1 can be of: one file makes the objective of one, or of several close ones."""
