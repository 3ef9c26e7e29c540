"""The mathematics: functions of the arrays of one matrix, or of a batch, which read like the equations."""
