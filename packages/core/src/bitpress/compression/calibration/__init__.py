"""Running a model on data, one decoder block at a time, in bounded memory."""
