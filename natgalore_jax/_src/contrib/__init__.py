"""Methods of other publications with the same memory."""
