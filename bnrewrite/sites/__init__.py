"""Sites: BatchNorm modules that are distributed whatever code calls them."""
