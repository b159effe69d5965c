"""Tools that a model may call: the formats in which bases and artifacts write them, their calls and their results."""
