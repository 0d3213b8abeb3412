"""`das-ds report`: from run folders to a comparison and what is drawn of it."""
