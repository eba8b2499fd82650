"""What exporter and device agree on: bundles and device profiles."""
