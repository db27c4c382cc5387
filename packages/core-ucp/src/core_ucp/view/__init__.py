"""What a checkpoint holds and where it lies, whoever wrote it: atoms, boxes, pieces, files."""
