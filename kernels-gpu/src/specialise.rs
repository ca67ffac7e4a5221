//! Binding: the step between rustc and ptxas that gives the specialisation constants of a kernel their values.
//!
//! The build binds the PTX that it assembles, and the host binds the PTX that the driver compiles. Each result is a
//! [`Form`] of the kernel.

use std::borrow::ToOwned;
use std::format;
use std::string::String;

use crate::ground::constants::{ConstantPlace, Constants, Form};

/// Start of a placeholder's operand. The bit of the constant follows.
const PLACEHOLDER: &str = "FF_CONSTANT_";

/// Replaces every placeholder in the PTX of a kernel: by the number of the constant in `form`, or if it is open by a
/// load of the launch parameter.
///
/// # Errors
/// A placeholder of a constant that `places` lacks, or one in another instruction than a `mov.b32`.
pub fn bind(text: &str, symbol: &str, places: &[ConstantPlace], form: Form) -> Result<String, String> {
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
        bound.push_str(&match form.value(bit) {
            Some(value) => format!("\tmov.b32 {register}, {};\n", u32::from(value)),
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

/// Returns the name of a form, for files and people: the kernel's symbol, then the names of the constants that are 1,
/// or `plain` if none is, and after `any` the names of those that are open. It ends in `_general` if all are open. A
/// kernel without constants has its symbol alone.
pub fn name(symbol: &str, places: &[ConstantPlace], form: Form) -> String {
    if places.is_empty() {
        return symbol.to_owned();
    }
    let form = form.only(places);
    if form == Form::GENERAL.only(places) {
        return format!("{symbol}_general");
    }
    let join = |name: String, of: Constants| {
        let set = (0..).zip(Constants::NAMES).filter(|&(bit, _)| of.has(bit));
        set.fold(name, |name, (_, constant)| name + "_" + constant)
    };
    let ones = if form.values() == Constants::NONE { "_plain" } else { "" };
    let name = join(symbol.to_owned() + ones, form.values());
    if form.open() == Constants::NONE { name } else { join(name + "_any", form.open()) }
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
        let bound = bind(TEXT, "k", &PLACES, Form::of(RIGHT)).unwrap();
        let expected = TEXT
            .replace("mov.b32 %r1, FF_CONSTANT_0;", "mov.b32 %r1, 0;")
            .replace("mov.b32 \t%r22, FF_CONSTANT_1;", "mov.b32 %r22, 1;");
        assert_eq!(bound, expected);
        assert!(!bind(TEXT, "k", &PLACES, Form::of(BOTH)).unwrap().contains(", 0;"));
    }

    #[test]
    fn the_general_form_loads_the_parameter() {
        let bound = bind(TEXT, "k", &PLACES, Form::GENERAL).unwrap();
        assert!(bound.contains("\tld.param.b32 %r1, [k_param_0+40];\n"), "{bound}");
        assert!(bound.contains("\tld.param.b32 %r22, [k_param_0+44];\n"), "{bound}");
        assert!(!bound.contains(PLACEHOLDER) && !bound.contains("mov.b32"), "{bound}");
        assert_eq!(bound.lines().count(), TEXT.lines().count());
    }

    #[test]
    fn text_without_placeholders_stays_as_it_is() {
        for text in ["", "one line", "two\nlines\n"] {
            for form in [Form::GENERAL, Form::of(BOTH)] {
                assert_eq!(bind(text, "k", &[], form).unwrap(), text);
            }
        }
    }

    #[test]
    fn placeholders_that_do_not_fit_are_errors() {
        for form in [Form::GENERAL, Form::of(BOTH)] {
            let error = bind(TEXT, "k", &PLACES[..1], form).unwrap_err();
            assert!(error.contains('k') && error.contains("right"), "{error}");
        }
        let error = bind("\tmov.b32 %r1, FF_CONSTANT_77;\n", "k", &PLACES, Form::GENERAL).unwrap_err();
        assert!(error.contains("77"), "{error}");
        for line in ["add.s32 %r1, %r2, FF_CONSTANT_0;", "mov.b32 %r1, FF_CONSTANT_x;", "mov.b32 FF_CONSTANT_0;"] {
            let error = bind(line, "k", &PLACES, Form::GENERAL).unwrap_err();
            assert!(error.contains(line), "{error}");
        }
    }

    #[test]
    fn one_constant_may_stay_open() {
        let bound = bind(TEXT, "k", &PLACES, Form::of(BOTH).opening(Constants::RIGHT)).unwrap();
        assert!(bound.contains("\tmov.b32 %r1, 1;\n"), "{bound}");
        assert!(bound.contains("\tld.param.b32 %r22, [k_param_0+44];\n"), "{bound}");
    }

    #[test]
    fn forms_have_names() {
        let name = |form| name("k", &PLACES, form);
        assert_eq!(name(Form::GENERAL), "k_general");
        assert_eq!(name(Form::of(Constants::NONE)), "k_plain");
        assert_eq!(name(Form::of(RIGHT)), "k_right");
        assert_eq!(name(Form::of(BOTH)), "k_left_right");
        assert_eq!(name(Form::of(Constants::NONE).opening(Constants::LEFT)), "k_plain_any_left");
        assert_eq!(name(Form::of(BOTH).opening(Constants::LEFT)), "k_right_any_left");
        // A constant that the kernel lacks makes no difference.
        assert_eq!(super::name("k", &PLACES[..1], Form::of(RIGHT)), "k_plain");
        assert_eq!(super::name("k", &[], Form::of(BOTH)), "k");
        assert_eq!(super::name("k", &[], Form::GENERAL), "k");
    }
}
