"""The commands around arcface_torch: `kdhooks run`, `doctor`, `taps`, `cache` and `export`."""
