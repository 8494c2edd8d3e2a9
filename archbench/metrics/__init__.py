"""One file a metric. The file's name is the metric's name; it exports METRIC."""
