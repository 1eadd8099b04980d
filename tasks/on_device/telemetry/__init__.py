"""What a machine tells about itself while it works: power, temperatures, clocks, memory, and what slowed it down."""
