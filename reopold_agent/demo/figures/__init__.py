"""The geometry environment's embedded default: drawn figures, a tiny student and teacher."""
