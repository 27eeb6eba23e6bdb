"""What leaves: the folder of a cleaned model, its exports, its classifier, its page."""
