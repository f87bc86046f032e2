"""Dense products with MXFP4 weights."""
