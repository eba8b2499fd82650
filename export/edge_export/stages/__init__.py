"""What each stage of an export does: one module a stage, named as in the list in `edge_export.pipeline`.

A stage takes the frozen value of the stage before it and returns its own (`values`). Where decoders and
encoders differ, the module ends in a table with a row for each.
"""
