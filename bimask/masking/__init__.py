"""Where a model can be masked, the masks, and a frozen net that answers under many of them."""
