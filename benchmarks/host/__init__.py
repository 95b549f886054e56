"""What Python costs for a step, a token or a launch, without a device."""
