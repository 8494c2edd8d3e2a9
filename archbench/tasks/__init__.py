"""One file a task: texts with a question in them, made from a seed."""
