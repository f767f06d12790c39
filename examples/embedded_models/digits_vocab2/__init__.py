"""The recipe of the digits' teacher with another vocabulary; see README.md."""
