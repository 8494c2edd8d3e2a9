"""Speed against what a user would take instead, and against the machine's limit: contests with targets."""
