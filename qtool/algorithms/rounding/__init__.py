"""What the methods that choose integers of weights share: what a layer reads, its grid, its loss."""
