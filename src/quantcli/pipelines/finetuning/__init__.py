"""What a finetune run needs besides its loop."""
