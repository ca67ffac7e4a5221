//! The GPU kernels of ferroflash, with their CPU executor and what the host shares with them.
#![no_std]
#![deny(unsafe_op_in_unsafe_fn)]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch, stdarch_nvptx))]

#[cfg(not(target_arch = "nvptx64"))]
extern crate std;

pub mod arch;
pub mod attention;
pub mod element;
#[cfg(target_arch = "nvptx64")]
pub mod entry;
pub mod ground;
pub mod kernels;
pub mod params;
pub mod pipeline;
pub mod rows;
#[cfg(not(target_arch = "nvptx64"))]
pub mod specialise;
pub mod tile;
pub mod tuning;
#[cfg(not(target_arch = "nvptx64"))]
pub mod variants;

#[cfg(all(feature = "cpu", not(target_arch = "nvptx64")))]
pub use arch::cpu;
pub use element::Element;
