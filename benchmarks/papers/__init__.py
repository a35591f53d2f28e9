"""Every method, alone and in pairs, on faces of people never seen in training."""
