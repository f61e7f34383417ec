"""Where a model comes from: its cache geometry, its K and V weights, the model itself."""
