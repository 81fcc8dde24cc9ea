"""Images to labels and scores."""
