//! Instruction sets: every loop over elements is compiled for the least that the target has, and for AVX2 as well; the
//! processor says at run time which copy runs.
//!
//! The copies of an elementwise loop do the same operations in the same order, so they give the same bits. Products use
//! fused multiply-add where there is one ([`super::matmul`]); those bits depend on the processor.

/// An instruction set that loops are compiled for; a later one has all of those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What the compilation target guarantees.
    Target,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512F.
    Avx512,
}

impl Isa {
    /// The last one that this processor has.
    #[cfg(target_arch = "x86_64")]
    pub fn best() -> Isa {
        use std::is_x86_feature_detected as has;
        // The standard library asks the processor once and remembers.
        if !(has!("avx2") && has!("fma") && has!("f16c")) {
            Isa::Target
        } else if has!("avx512f") {
            Isa::Avx512
        } else {
            Isa::Avx2
        }
    }
    /// The last one that this processor has.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn best() -> Isa {
        Isa::Target
    }
}

/// Defines a function whose body is compiled for the target and for [`Isa::Avx2`], and that runs the one which the
/// processor has.
macro_rules! dispatched {
    ($(#[$attribute:meta])*
     $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$attribute])*
        #[inline(never)]
        $visibility fn $name($($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($argument: $type),*) $(-> $result)? {
                    body($($argument),*)
                }
                if $crate::arch::cpu::isa::Isa::best() >= $crate::arch::cpu::isa::Isa::Avx2 {
                    // SAFETY: this processor has the features that `avx2` is compiled for.
                    return unsafe { avx2($($argument),*) };
                }
            }
            body($($argument),*)
        }
    };
}
pub(super) use dispatched;
