"""The mathematics: functions of arrays, of a matrix or of a batch, that read like the equations."""
