"""Sites: BatchNorm modules that distribute themselves, whatever code calls them."""
