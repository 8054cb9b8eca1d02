"""The rules that balance reconstruction and KL, one family a file; bvae.balance has their names."""
