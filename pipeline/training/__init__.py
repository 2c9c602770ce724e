"""What the training loop is made of besides the step itself: batch arithmetic, precision, guards."""
