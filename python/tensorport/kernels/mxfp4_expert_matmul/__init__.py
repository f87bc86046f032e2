"""Products of tokens with the MXFP4 matrix of an expert each."""
