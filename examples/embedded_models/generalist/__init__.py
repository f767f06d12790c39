"""The recipe of the embedded models; see README.md."""
