"""What is asked, planned and stepped: requests, cache blocks, the scheduler, the step loop. No torch."""
