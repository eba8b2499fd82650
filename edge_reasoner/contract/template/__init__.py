"""Chat templates: rendered in a guarded sandbox, by the exporter and the device alike."""
