"""The reference backend in torch operations, for any device."""
