"""Published claims, judged by records: `baselines/papers/*.yaml` says what was claimed and which check decides."""
