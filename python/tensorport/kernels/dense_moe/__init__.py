"""The mixture of experts of gpt-oss with dense matrices."""
