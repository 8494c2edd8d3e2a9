"""Text in: documents, the corpora they come from, their split, and the token windows that every model trains on."""
