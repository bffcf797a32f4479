"""Solutions of the exercises, one module a chapter: functions of the same names as the stubs."""
