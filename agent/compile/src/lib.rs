//! Desired state to map images, and the ordered difference of two images. Pure: no I/O.
#![forbid(unsafe_code)]

mod image;

pub use image::{Frontend, Image, Op, ServiceImage};
