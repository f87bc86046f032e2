"""The mixture of MXFP4 experts of gpt-oss."""
