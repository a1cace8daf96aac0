"""CoFT and CoFT+ where the weights are at hand: what a black box is compared with."""
