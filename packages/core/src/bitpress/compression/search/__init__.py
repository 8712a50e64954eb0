"""Which layers get which of several schemes, so that the model loses least in so many bytes."""
