#pragma once

#include <stdexcept>
#include <string>

namespace gemma2_fast {

// Thrown at a room's border; the bindings map each to the class of gemma2_fast.errors of the same name.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct RequestError : Error {  // a request that can never be served as it stands
    using Error::Error;
};
struct CapacityError : Error {  // more memory, blocks or slots than there are
    using Error::Error;
};
struct BackendError : Error {  // a path this machine or build cannot take
    using Error::Error;
};

}  // namespace gemma2_fast
