"""What training data is: counted, checked, printed and drawn."""
