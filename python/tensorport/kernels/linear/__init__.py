"""Products with dense matrices as checkpoints store them: [out, in]."""
