"""Commands beside the scripts: none is needed to train."""
