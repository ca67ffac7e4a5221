//! Binding: the step between rustc and ptxas that gives the specialisation constants of a kernel their values.
//!
//! The build binds the PTX that it assembles, and the host binds the PTX that the driver compiles. Each result is a
//! form of the kernel: general, or specialised to one combination of [`Constants`].

use std::borrow::ToOwned;
use std::format;
use std::string::String;

use crate::ground::constants::{ConstantPlace, Constants};

/// Start of a placeholder's operand. The bit of the constant follows.
const PLACEHOLDER: &str = "FF_CONSTANT_";

/// Replaces every placeholder in the PTX of a kernel: by the number in `constants`, or if that is `None` by a load of
/// the launch parameter. The result is the specialised or the general form of the kernel.
///
/// # Errors
/// A placeholder of a constant that `places` lacks, or one in another instruction than a `mov.b32`.
pub fn bind(
    text: &str,
    symbol: &str,
    places: &[ConstantPlace],
    constants: Option<Constants>,
) -> Result<String, String> {
    let mut bound = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        if !line.contains(PLACEHOLDER) {
            bound.push_str(line);
            continue;
        }
        let (register, bit) = placeholder(line)
            .ok_or_else(|| format!("the kernel {symbol} has a placeholder that can't be read: {}", line.trim()))?;
        let place = places.iter().find(|place| place.bit == bit).ok_or_else(|| {
            let name = Constants::NAMES.get(bit as usize).unwrap_or(&"without a name");
            format!("the kernel {symbol} has a placeholder of constant {bit}, {name}, which its list lacks")
        })?;
        bound.push_str(&match constants {
            Some(constants) => format!("\tmov.b32 {register}, {};\n", u32::from(constants.has(bit))),
            None => format!("\tld.param.b32 {register}, [{symbol}_param_0+{}];\n", place.offset),
        });
    }
    Ok(bound)
}

/// Returns register and constant of a line `mov.b32 REGISTER, FF_CONSTANT_BIT;`.
fn placeholder(line: &str) -> Option<(&str, u32)> {
    let operands = line.trim().strip_prefix("mov.b32")?.strip_suffix(';')?;
    let (register, constant) = operands.split_once(',')?;
    Some((register.trim(), constant.trim().strip_prefix(PLACEHOLDER)?.parse().ok()?))
}

/// Returns the name of a form, for files and people: the kernel's symbol, followed by `_general`, by `_plain` if no
/// constant is 1, or by the names of the constants that are. A kernel without constants has its symbol alone.
pub fn name(symbol: &str, places: &[ConstantPlace], constants: Option<Constants>) -> String {
    if places.is_empty() {
        return symbol.to_owned();
    }
    let Some(constants) = constants.map(|constants| constants.only(places)) else {
        return format!("{symbol}_general");
    };
    if constants == Constants::NONE {
        return format!("{symbol}_plain");
    }
    let set = (0..).zip(Constants::NAMES).filter(|&(bit, _)| constants.has(bit));
    set.fold(symbol.to_owned(), |name, (_, constant)| name + "_" + constant)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACES: [ConstantPlace; 2] =
        [ConstantPlace { bit: Constants::LEFT, offset: 40 }, ConstantPlace { bit: Constants::RIGHT, offset: 44 }];
    const RIGHT: Constants = Constants::NONE.with(Constants::RIGHT, true);
    const BOTH: Constants = RIGHT.with(Constants::LEFT, true);
    const TEXT: &str = "\
.visible .entry k(
\t.param .align 16 .b8 k_param_0[48]
)
{
\t// begin inline asm
\tmov.b32 %r1, FF_CONSTANT_0;
\t// end inline asm
\tmov.b32 \t%r22, FF_CONSTANT_1;
\tret;
}
";

    #[test]
    fn numbers_specialise() {
        let bound = bind(TEXT, "k", &PLACES, Some(RIGHT)).unwrap();
        let expected = TEXT
            .replace("mov.b32 %r1, FF_CONSTANT_0;", "mov.b32 %r1, 0;")
            .replace("mov.b32 \t%r22, FF_CONSTANT_1;", "mov.b32 %r22, 1;");
        assert_eq!(bound, expected);
        assert!(!bind(TEXT, "k", &PLACES, Some(BOTH)).unwrap().contains(", 0;"));
    }

    #[test]
    fn the_general_form_loads_the_parameter() {
        let bound = bind(TEXT, "k", &PLACES, None).unwrap();
        assert!(bound.contains("\tld.param.b32 %r1, [k_param_0+40];\n"), "{bound}");
        assert!(bound.contains("\tld.param.b32 %r22, [k_param_0+44];\n"), "{bound}");
        assert!(!bound.contains(PLACEHOLDER) && !bound.contains("mov.b32"), "{bound}");
        assert_eq!(bound.lines().count(), TEXT.lines().count());
    }

    #[test]
    fn text_without_placeholders_stays_as_it_is() {
        for text in ["", "one line", "two\nlines\n"] {
            for constants in [None, Some(BOTH)] {
                assert_eq!(bind(text, "k", &[], constants).unwrap(), text);
            }
        }
    }

    #[test]
    fn placeholders_that_do_not_fit_are_errors() {
        for constants in [None, Some(BOTH)] {
            let error = bind(TEXT, "k", &PLACES[..1], constants).unwrap_err();
            assert!(error.contains('k') && error.contains("right"), "{error}");
        }
        let error = bind("\tmov.b32 %r1, FF_CONSTANT_77;\n", "k", &PLACES, None).unwrap_err();
        assert!(error.contains("77"), "{error}");
        for line in ["add.s32 %r1, %r2, FF_CONSTANT_0;", "mov.b32 %r1, FF_CONSTANT_x;", "mov.b32 FF_CONSTANT_0;"] {
            let error = bind(line, "k", &PLACES, None).unwrap_err();
            assert!(error.contains(line), "{error}");
        }
    }

    #[test]
    fn forms_have_names() {
        assert_eq!(name("k", &PLACES, None), "k_general");
        assert_eq!(name("k", &PLACES, Some(Constants::NONE)), "k_plain");
        assert_eq!(name("k", &PLACES, Some(RIGHT)), "k_right");
        assert_eq!(name("k", &PLACES, Some(BOTH)), "k_left_right");
        // A constant that the kernel lacks makes no difference.
        assert_eq!(name("k", &PLACES[..1], Some(RIGHT)), "k_plain");
        assert_eq!(name("k", &[], Some(BOTH)), "k");
        assert_eq!(name("k", &[], None), "k");
    }
}
