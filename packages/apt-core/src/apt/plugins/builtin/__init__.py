"""The plugins of the draft that needed no other library."""
