"""Elementary functions of float32 and float64, in jitted code and for arrays; no C library has a part in them."""
