"""Why AP is what it is: causes of errors, confusion, thresholds, AP over sizes, intervals, and two models compared."""
